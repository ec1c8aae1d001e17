from django.contrib import admin

from pypi.models import Project, Upload


@admin.register(Project)
class ProjectAdmin(admin.ModelAdmin):
    search_fields = ["name"]


@admin.register(Upload)
class UploadAdmin(admin.ModelAdmin):
    list_display = ["filename", "project", "version", "packagetype", "size", "uploaded_at", "yanked"]
    list_filter = ["packagetype", "yanked"]
    list_select_related = ["project"]
    date_hierarchy = "uploaded_at"  # a year chosen here is one partition
    autocomplete_fields = ["project"]
    show_full_result_count = False  # it would count the whole table for each filtered page
